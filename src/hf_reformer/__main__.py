"""`python -m hf_reformer` is `hf-reformer`."""

from .cli.main import main

raise SystemExit(main())
