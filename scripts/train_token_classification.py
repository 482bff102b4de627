"""The recipe `hf-reformer train token-classification` as a script; `--help` shows examples and options."""

from hf_reformer.recipes.token_classification import main

if __name__ == "__main__":
    main()
