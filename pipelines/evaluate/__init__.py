"""``uwm evaluate``: open loop on held-out episodes, closed loop in simulators."""
