// A convolution of few channels in a group, computed in place, without copies.
//
//     y[n, g, k, o]  = bias[g, k] + sum over c, t of w[g, k, c, t] * x[n, g, c, i]
//
// with i as in index.cuh.  There are always three spatial axes (RANK), of which an
// array may have fewer: an axis of one element costs a few instructions, which the
// images of a thread share, and saves two thirds of the variants.  Every array has its
// own steps for every axis, negative ones and zeros included.
//
// Offsets and counts of items may pass 2^31 (INDEX), coordinates do not (CELL): the
// divisions of an axis stay short.
//
// Macros: IMAGES; the kernels' own are ELEMENT, SUM, and RESULT, the type in which sums
// are stored.

// Images that a thread computes at once: they share its index arithmetic, its weights
// and the range of taps inside, and their loads do not wait for one another.  16 bytes
// of sums, so that registers suffice for every type.
#ifndef IMAGES
#define IMAGES 4
#endif

// Forward, the source is x, `own` counts the filters of a group and `inner` its
// channels; adjoint, the source is dy and the two are exchanged.  `out` is the result;
// for the gradient of the weights, the roles are those of forward, and `out` is dy.
struct Direct {
    CELL images, groups, own, inner;
    CELL each;              // images of an item, 1 or IMAGES
    CELL channels_fastest;  // neighbouring threads: channels if set, else elements
    CELL adjoint;
    CELL conjugated;        // of the weights
    CELL taps_each, block_filters;  // of a block, for the gradient of the weights
    DivisorOf<CELL> by_channels, by_own;  // channels of the result: all, and of a group
    INDEX source_image, source_group, source_channel;
    INDEX w_group, w_own, w_inner;
    INDEX out_image, out_group, out_channel;
    INDEX bias_step;
    INDEX items;  // elements, of as many images
    INDEX blocks;
    Axis axis[RANK];  // x_step is that of the source
};

#ifdef DIRECT_BYTES
static_assert(sizeof(Direct) == DIRECT_BYTES, "the host packs another Direct");
#endif
