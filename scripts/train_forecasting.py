"""The recipe `hf-reformer train forecasting` as a script; `--help` shows examples and options."""

from hf_reformer.recipes.forecasting import main

if __name__ == "__main__":
    main()
