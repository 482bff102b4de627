"""Run `hf-reformer` as `python -m hf_reformer`."""

from reformer_cli.main import main

raise SystemExit(main())
