"""One layer becomes several, exactly."""
