"""The recipe `hf-reformer train image-generation` as a script; `--help` shows examples and options."""

from hf_reformer.recipes.image_generation import main

if __name__ == "__main__":
    main()
