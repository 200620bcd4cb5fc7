"""What the commands do: quantize, evaluate, load, plan, compare, benchmark."""
