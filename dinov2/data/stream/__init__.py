"""The endless stream of samples: order, mixing, reading ahead, decode workers and batches on the device."""
