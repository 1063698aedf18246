"""What needs a GPU: the stages of a call, checks of the Triton kernels, replayed graphs, tuning."""
