"""May models be merged, how far are they from each other, and what is lost of them?"""
