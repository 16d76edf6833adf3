"""What several rooms need and none of them owns; imports nothing of svdk but its errors."""
