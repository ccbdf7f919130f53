"""Kernels that compute the blocks of PoolFormer and PoolFormerV2 in few passes over memory.

The arithmetic of a block is small compared with its memory traffic, so what counts is how often a tensor is read or
written. Tensors are [B, H, W, C] here, the memory layout of a channels_last image batch. `stats` is float32 [B, 2]: the
mean m and reciprocal deviation r of each image over C, H and W, as in GroupNorm with one group.

Token mixer branch. norm(x) = g (x - m) r + b with g and b per channel. The average A over a window without its padding
maps constants to themselves, so m and b cancel out:

    A norm(x) - norm(x) = g r (A x - x)
    y = x + k s r (A x - x)                 s = g * layer scale, per channel; k = drop path's mask / keep, per image

Its gradients, with D = A - 1, e the gradient of y, n = C H W:

    S = sum over positions of e * (D x)     per image and channel
    gradient of s = sum over images of k r S
    gradient of r = k * sum over channels of s S
    gradient of x = e + k s r (D^T e) - r^3 (x - m) / n * (gradient of r)

Since b cancels out, the true gradient of norm1's bias is zero. The fused operators return exactly zero, while the plain
path returns the rounding errors of the cancelling terms.

Channel MLP branch. z = y + k l o with o = W2 gelu(W1 norm(y) + b1) + b2 and l the layer scale. With e the gradient of z
and a the activation, the backward pass needs neither l * o nor o:

    G = (k e)^T a                           [C, 4C], a matrix product
    gradient of W2 = l G (per row);  of l = rowsum(G * W2) + b2 * colsum(k e);  of b2 = l * colsum(k e)

PoolFormerV2's blocks without residual scale are this with l = 1, without b, b1 and with StarReLU, s relu(x)^2 + t, as
activation. Its scalars go into the second layer: the operators compute (s W2) relu(x)^2 + t (W2's sums over rows).

The passes that write y and z also compute their statistics. The statistics are not differentiated: each consumer
returns the full gradient of its input, including the part through the statistics.
"""
