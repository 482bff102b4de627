"""The recipe `hf-reformer train classification` as a script; `--help` shows examples and options."""

from hf_reformer.recipes.classification import main

if __name__ == "__main__":
    main()
