"""An A-ViT from a static network's weights, with and without that network as a teacher, and from
random weights.
"""
