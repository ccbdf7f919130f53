"""Kernels that compute the blocks of both papers' networks, or their MLP branches, in few passes over memory.

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

Channel MLP branch. z = y + k l o with o = W2 a + b2, a the activation of h = W1 (g u + b) + b1, u the normalised pixels
(y - m) r, and l the layer scale. The operators fold g and b into the first layer, h = (W1 g) u + (b1 + W1 b), and l
into the second one. With e the gradient of z, the backward pass needs neither l o nor o:

    G = (k e)^T a                           [C, 4C], a matrix product
    gradient of W2 = l G (per row);  of l = rowsum(G * W2) + b2 * colsum(k e);  of b2 = l * colsum(k e)

With d the gradient of h, and v = (W1 g)^T d that of u:

    M = d^T u                               [4C, C], a matrix product
    gradient of b1 = colsum(d);  of W1 = M g (per column) + outer(gradient of b1, b)
    gradient of g = colsum(W1 * M);  of b = W1^T (gradient of b1)
    gradient of y = e + r (v - mean(v) - u mean(v * u)), with means over each image

The image's sum of v is that of d . rowsum(W1 g), and its sum of v * u that of d . (h - b1 - W1 b). The activation's
backward pass computes both, so no pass reads v only to sum it. The pass that writes the gradient of y also computes S.

The second paper's blocks are this with l = 1, without b, b1 and with StarReLU, s relu(x)^2 + t, as activation. Its
scalars go into the second layer: the operators compute (s W2) relu(x)^2 + t (W2's sums over rows). ConvFormer's and
CAFormer's norms are over the channels of each position.

With a residual scale q per channel, q x takes the place of x in y, q e that of e in the gradient of x, and the gradient
of q is the sum of e * x over images and positions; the second branch likewise. Without a token mixer, the first branch
is the norm alone: y = q x + k l norm(x).

The passes that write y and z also compute their statistics. The statistics are not differentiated: the gradient of a
block's input includes the part through them.
"""
