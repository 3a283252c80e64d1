"""Who guesses the next tokens, one file each; speculation.py decides how many guesses a step verifies."""
