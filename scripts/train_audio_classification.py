"""The recipe `hf-reformer train audio-classification` as a script; `--help` shows examples and options."""

from hf_reformer.recipes.audio_classification import main

if __name__ == "__main__":
    main()
