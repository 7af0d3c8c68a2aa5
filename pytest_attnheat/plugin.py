"""What pytest calls: options, ini settings, markers and hooks. Loads nothing heavy."""
