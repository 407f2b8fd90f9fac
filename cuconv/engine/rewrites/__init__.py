"""Rewrites of a convolution to basic ones.

    canonical     the first: fewer axes, by other views of the arrays
    polyphase     input dilation: phases of the output, no zero is multiplied;
                  a strided input gradient: phases of the input, where that is faster
    padded_copy   padding modes and batch groups: blocks over a padded copy
    zero_points   int8 and uint8: blocks over a copy in floats, minus zero points

Every part is planned by itself: any strategy may run it.
"""
