"""What is measured: convolutions, encoders and training steps, each with what it is compared with."""
