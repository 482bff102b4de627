"""The recipe `hf-reformer train multiple-choice` as a script; `--help` shows examples and options."""

from hf_reformer.recipes.multiple_choice import main

if __name__ == "__main__":
    main()
