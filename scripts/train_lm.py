"""The recipe `hf-reformer train language-model` as a script; `--help` shows examples and options."""

from hf_reformer.recipes.language_model import main

if __name__ == "__main__":
    main()
