//! CIFAR-10's binary batches: records of 3073 bytes, a label and 32×32 pixels as three planes (red, green, blue).

use super::Fault;

/// [H, W, C].
pub(super) const SHAPE: [usize; 3] = [32, 32, 3];
const PLANE: usize = 32 * 32;
/// A label and three planes.
pub(super) const RECORD: usize = 1 + 3 * PLANE;

/// Checks a whole batch file and returns its number of records.
pub(super) fn check(file: &[u8]) -> Result<u64, Fault> {
    if file.is_empty() {
        return Err(Fault::Empty { found: "an empty file".into(), help: "fetch it again" });
    }
    if !file.len().is_multiple_of(RECORD) {
        return Err(Fault::Records { record: RECORD, found: file.len() as u64 });
    }
    for (i, record) in file.chunks_exact(RECORD).enumerate() {
        if record[0] > 9 {
            return Err(Fault::Label { record: i as u64, found: record[0] });
        }
    }
    Ok((file.len() / RECORD) as u64)
}

/// Writes the pixels of one record as [32, 32, 3].
pub(super) fn interleave(record: &[u8], out: &mut [u8]) {
    let (red, rest) = record[1..].split_at(PLANE);
    let (green, blue) = rest.split_at(PLANE);
    for (pixel, ((r, g), b)) in out.chunks_exact_mut(3).zip(red.iter().zip(green).zip(blue)) {
        pixel.copy_from_slice(&[*r, *g, *b]);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn planes_become_pixels() {
        let mut record = vec![7];
        for plane in 0..3u8 {
            record.extend((0..PLANE).map(|i| (i % 80) as u8 + 80 * plane));
        }
        assert_eq!(check(&record), Ok(1));
        let mut out = vec![0; 3 * PLANE];
        interleave(&record, &mut out);
        for (i, pixel) in out.chunks(3).enumerate() {
            let red = (i % 80) as u8;
            assert_eq!(pixel, [red, red + 80, red + 160]);
        }
    }

    #[test]
    fn other_sizes_and_labels_are_refused() {
        assert!(matches!(check(&[]), Err(Fault::Empty { .. })));
        assert_eq!(check(&[0; RECORD - 1]), Err(Fault::Records { record: RECORD, found: 3072 }));
        assert_eq!(check(&[0; RECORD + 1]), Err(Fault::Records { record: RECORD, found: 3074 }));
        let mut two = vec![0; 2 * RECORD];
        two[RECORD] = 10;
        assert_eq!(check(&two), Err(Fault::Label { record: 1, found: 10 }));
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_count_or_an_error(
            bytes in prop::collection::vec(any::<u8>(), 0..100), length in 0usize..4 * RECORD,
        ) {
            let file: Vec<u8> = bytes.iter().copied().chain(std::iter::repeat(0)).take(length).collect();
            if let Ok(count) = check(&file) {
                prop_assert_eq!(count as usize * RECORD, length);
            }
        }
    }
}
