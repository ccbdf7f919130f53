"""PoolFormer's block in few passes over memory.

The arithmetic of a block is small beside its traffic, so what counts is how often a tensor is read or written. Tensors
are [B, H, W, C] here (the memory of a channels_last image batch), and "unit" is one such tensor. `stats` is float32
[B, 2]: mean m and reciprocal deviation r of each image over C, H and W, as GroupNorm with one group has them.

Token mixer's branch. norm(x) = g (x - m) r + b with g and b per channel, and the average A of a window without its
padding maps constants to themselves, so that m and b cancel:

    A norm(x) - norm(x) = g r (A x - x)
    y = x + k s r (A x - x)                 s = g * layer scale, per channel; k = drop path's mask / keep, per image

Its gradient, with D = A - 1, e the gradient of y, n = C H W:

    S = sum over positions of e * (D x)     per image and channel
    gradient of s = sum over images of k r S
    gradient of r = k * sum over channels of s S
    gradient of x = e + k s r (D^T e) - r^3 (x - m) / n * (gradient of r)

Adding b to y's arguments is all that norm1's bias does: its true gradient is zero, and zero it is here, while the plain
path gives it the rounding errors of the cancelling terms.

Channel MLP's branch. z = y + k l o with o = W2 gelu(W1 norm(y) + b1) + b2 and l the layer scale. With e the gradient of
z, and a the activation, neither l * o nor o is needed again:

    G = (k e)^T a                           [C, 4C], a matrix product
    gradient of W2 = l G (per row);  of l = rowsum(G * W2) + b2 * colsum(k e);  of b2 = l * colsum(k e)

The statistics of y and z come out of the passes that write them. They carry no gradient of their own: each consumer
returns the whole gradient of its input, that through the statistics included.
"""
