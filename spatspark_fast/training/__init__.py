"""What trainings share: their options, plan, stream of batches, checkpoints and records."""
