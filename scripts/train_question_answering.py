"""The recipe `hf-reformer train question-answering` as a script; `--help` shows examples and options."""

from hf_reformer.recipes.question_answering import main

if __name__ == "__main__":
    main()
