"""What one device sends, by kind of collective and by mesh axes: asked for in a traced program, and left in a compiled one.

Conventions, for an array of S bytes on p devices, by the ring algorithms that need no more than this:

    all_gather          S (p − 1) / p    S: the result
    reduce_scatter      S (p − 1) / p    S: the operand
    all_to_all          S (p − 1) / p
    ragged_all_to_all   S (p − 1) / p    S: the smaller of operand and result; what an even choice sends
    psum, pmax, pmin, reduce, all_reduce  2 S (p − 1) / p
    ppermute            S                of the devices that send to another one

Axes of size 1 send nothing and are left out; an operation over several axes is labelled with all of them, as in
`data+expert`. A loop counts as often as it runs; of several branches each kind counts where it is largest. A loop whose
trips nobody can know counts once, and the table says so in `unknown`.
"""
