"""`python -m hf_reformer` is `hf-reformer`."""

from reformer_cli.main import main

raise SystemExit(main())
