"""The recipe `hf-reformer train image-classification` as a script; `--help` shows examples and options."""

from hf_reformer.recipes.image_classification import main

if __name__ == "__main__":
    main()
