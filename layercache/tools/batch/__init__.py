"""Many prompts: a picture or video of each, in a folder that goes on where it was stopped."""
