"""What x86 multiplies bytes and gathers comparisons with, each shared by the CPUs that have it."""

from targets._target import ByteProduct

AVX2 = ByteProduct(name="avx2", lanes=8, quads="", pairs="llvm.x86.avx2.pmadd.ub.sw", words="llvm.x86.avx2.pmadd.wd")
AVX512BW = ByteProduct(
    name="avx512bw",
    lanes=16,
    quads="",
    pairs="llvm.x86.avx512.pmaddubs.w.512",
    words="llvm.x86.avx512.pmaddw.d.512",
)
AVX512VNNI = ByteProduct(
    name="avx512vnni", lanes=16, quads="llvm.x86.avx512.vpdpbusd.512", pairs=AVX512BW.pairs, words=AVX512BW.words
)

SIGN_BITS = "llvm.x86.avx2.pmovmskb"
