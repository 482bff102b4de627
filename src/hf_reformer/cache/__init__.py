"""What generation keeps of the tokens so far."""
