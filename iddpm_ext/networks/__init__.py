"""The networks: the U-Net with OpenAI's keys, its parts, the classifier, and pairs of networks."""
