"""`python -m hf_reformer` is `hf-reformer`."""

from .cli import main

raise SystemExit(main())
