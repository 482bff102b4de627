"""The recipe `hf-reformer train seq2seq` as a script; `--help` shows examples and options."""

from hf_reformer.recipes.seq2seq import main

if __name__ == "__main__":
    main()
