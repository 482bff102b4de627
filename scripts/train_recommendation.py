"""The recipe `hf-reformer train recommendation` as a script; `--help` shows examples and options."""

from hf_reformer.recipes.recommendation import main

if __name__ == "__main__":
    main()
