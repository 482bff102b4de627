"""What LSH attention does, in numbers and in plots."""
