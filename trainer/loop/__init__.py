"""The GRPO loop: generation, optimizer step, state, jumps, logs."""
