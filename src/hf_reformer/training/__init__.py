"""What every recipe trains with: the model, trainers, metrics, reports, distributed training."""
