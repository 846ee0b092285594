"""Text that files of the second edition share: test_repo.py holds each copy equal to this one.

Scripts don't import each other, so a loader or a checkpoint stands in every file that needs it.
Where a file has a function of one of these names, it is this text, but for its own docstring.
"""

import os

import torch


def load_npz(path, labels=True):
    """An npz as Keras's mnist or cifar10 -> x (N, C, H, W) uint8, y (N,), x_test, y_test; C 1 or 3.

    Labels become 0, 1, .. in the order of the file's numbers. Without `labels` they are not asked
    for, and zeros. ValueError, naming what the file has, if that is something else.
    """
    import numpy as np

    file = np.load(path)  # allow_pickle=False
    data = []
    for part in ("train", "test"):
        x = file.get(f"x_{part}", np.zeros(0))
        y = file.get(f"y_{part}", np.zeros(0)) if labels else np.zeros(len(x), np.uint8)
        fits = x.dtype == np.uint8 and len(x) > 0 and x.shape[3:] in [(), (1,), (3,)] and x.ndim > 2
        if not fits or y.dtype.kind not in "iu" or y.shape not in [(len(x),), (len(x), 1)]:
            found = [f"{name} {file[name].dtype} {file[name].shape}" for name in file.files]
            raise ValueError(
                f"{path} has {', '.join(found)}; x_{part} must be uint8 (N, H, W), (N, H, W, 1) or"
                f" (N, H, W, 3), y_{part} whole numbers (N,)"
            )
        x = torch.from_numpy(x).view(*x.shape[:3], -1).permute(0, 3, 1, 2)  # (N, C, H, W)
        data += [x, torch.from_numpy(y.astype("int64")).flatten()]
    x, y, x_test, y_test = data
    # Files may be sorted by class. Shuffled once, with one seed, any part of x has all classes.
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    classes = y.unique()  # sorted; chance is 1 / len(classes)
    if labels and (len(classes) < 2 or not torch.isin(y_test, classes).all()):
        raise ValueError(
            f"{path}: y_train has the classes {classes.tolist()}, y_test others or one"
        )
    y = torch.searchsorted(classes, y)
    return x[order], y[order], x_test, torch.searchsorted(classes, y_test)


def save_checkpoint(path, step, model, optimizer, args):
    """Everything that the next step depends on."""
    state = dict(
        script="frame",
        step=step,
        args=vars(args),
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
    )
    torch.save(state, path + ".tmp")
    os.replace(path + ".tmp", path)  # all or nothing: a crash while saving leaves the old file
