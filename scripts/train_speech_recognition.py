"""The recipe `hf-reformer train speech-recognition` as a script; `--help` shows examples and options."""

from hf_reformer.recipes.speech_recognition import main

if __name__ == "__main__":
    main()
