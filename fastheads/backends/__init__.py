"""From the input of a projection to samples: factors, backends, the accumulator of their samples."""
