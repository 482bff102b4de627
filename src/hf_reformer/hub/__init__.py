"""To and from model repositories: registration, exporting, model cards, pipelines."""
