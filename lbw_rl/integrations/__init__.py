"""The governor in other people's training loops."""
