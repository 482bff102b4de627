"""The recipe `hf-reformer train chat` as a script; `--help` shows examples and options."""

from hf_reformer.recipes.chat import main

if __name__ == "__main__":
    main()
