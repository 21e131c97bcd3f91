//! Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"), one counter at a time
//! and [`LANES`] counters at a time.

const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// Counters computed together by [`philox4x32_10_lanes`].
pub(super) const LANES: usize = 64;
/// Counters whose rounds are interleaved in registers: two AVX-512 registers for each counter word.
const GROUP: usize = 16;

/// The four random words of one counter under one key.
pub const fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    let mut round = 0;
    while round < ROUNDS {
        let p0 = c0 as u64 * MULTIPLIER[0] as u64;
        let p1 = c2 as u64 * MULTIPLIER[1] as u64;
        (c0, c1, c2, c3) = ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
        k0 = k0.wrapping_add(WEYL[0]);
        k1 = k1.wrapping_add(WEYL[1]);
        round += 1;
    }
    [c0, c1, c2, c3]
}

/// The words of the [`LANES`] counters (first, …), (first+1, …), …: `words[w][l]` is word w of counter l.
///
/// Each word lives in the low half of a u64, whose high half holds rubbish: the 32×32→64-bit multiplication ignores it, so a
/// round is two multiplications, two shifts and two xors.
#[inline(always)]
pub(super) fn philox4x32_10_lanes(first: u32, rest: [u32; 3], key: [u32; 2], words: &mut [[u32; LANES]; 4]) {
    for start in (0..LANES).step_by(GROUP) {
        let mut c0 = [0u64; GROUP];
        let mut c1 = [rest[0] as u64; GROUP];
        let mut c2 = [rest[1] as u64; GROUP];
        let mut c3 = [rest[2] as u64; GROUP];
        for (lane, c) in c0.iter_mut().enumerate() {
            *c = first.wrapping_add((start + lane) as u32) as u64;
        }
        let [mut k0, mut k1] = key;
        for _ in 0..ROUNDS {
            for lane in 0..GROUP {
                let p0 = (c0[lane] & 0xFFFF_FFFF) * MULTIPLIER[0] as u64;
                let p1 = (c2[lane] & 0xFFFF_FFFF) * MULTIPLIER[1] as u64;
                c0[lane] = (p1 >> 32) ^ c1[lane] ^ k0 as u64;
                c1[lane] = p1;
                c2[lane] = (p0 >> 32) ^ c3[lane] ^ k1 as u64;
                c3[lane] = p0;
            }
            k0 = k0.wrapping_add(WEYL[0]);
            k1 = k1.wrapping_add(WEYL[1]);
        }
        for lane in 0..GROUP {
            words[0][start + lane] = c0[lane] as u32;
            words[1][start + lane] = c1[lane] as u32;
            words[2][start + lane] = c2[lane] as u32;
            words[3][start + lane] = c3[lane] as u32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that Random123 publishes (`kat_vectors`, philox4x32 10).
    #[test]
    fn random123_known_answers() {
        let ones = u32::MAX;
        for (counter, key, expected) in [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([ones; 4], [ones; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ] {
            assert_eq!(philox4x32_10(counter, key), expected);
        }
    }

    #[test]
    fn lanes_are_single_counters() {
        // The first counter is close enough to 2³² to wrap.
        let (first, rest, key) = (u32::MAX - 20, [3, 0xFFFF_FFFF, 0x0100_0007], [0x1234_5678, 0x9abc_def0]);
        let mut words = [[0; LANES]; 4];
        philox4x32_10_lanes(first, rest, key, &mut words);
        for (lane, found) in (0..LANES).map(|lane| (lane, words.map(|word| word[lane]))) {
            let single = philox4x32_10([first.wrapping_add(lane as u32), rest[0], rest[1], rest[2]], key);
            assert_eq!(found, single, "lane {lane}");
        }
    }
}
