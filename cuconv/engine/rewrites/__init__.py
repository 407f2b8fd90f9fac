"""Convolutions that are made of basic ones: general ones, and phases of strided ones.

    canonical     the first: fewer axes, by other views of the arrays
    polyphase     input dilation: phases of the output, no zero is multiplied;
                  a strided input gradient: phases of the input, where that is faster
    padded_copy   padding modes and batch groups: blocks over a padded copy
    zero_points   integers of 8 bits: blocks over a copy in floats, less zero points

Every part is planned as if it had been asked for alone: any strategy may run it.
"""
