"""What a run holds on the device and on the host: the device's face, meters, and cost arithmetic."""
