"""The normalisation of frames by the mean and standard deviation of their colours."""

Triple = tuple[float, float, float]

# Training frames are normalised with these, as the images of the paper's encoders were (arXiv 2603.26597).
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
