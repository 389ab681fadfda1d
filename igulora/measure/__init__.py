"""What a training step costs: launches, bytes, FLOPs, waits for the device and memory, counted or profiled, by part of the step."""
