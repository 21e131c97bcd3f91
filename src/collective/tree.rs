//! The one order in which values of several ranks (or shards) are added.

/// Adds up parts of equal length along a binary tree over their numbers, ((0+1)+(2+3))+((4+5)+(6+7)) and so on; the sum stands in the
/// first. Where their number is no power of two, the last ones join at a higher level: ((0+1)+2).
///
/// # Panics
/// If the parts differ in length.
pub fn sum_along_tree<P: AsMut<[f32]>>(parts: &mut [P]) {
    let mut apart = 1;
    while apart < parts.len() {
        for i in (0..parts.len() - apart).step_by(2 * apart) {
            let (left, right) = parts.split_at_mut(i + apart);
            let (sum, other) = (left[i].as_mut(), right[0].as_mut());
            assert_eq!(sum.len(), other.len(), "parts of a sum");
            add(sum, other);
        }
        apart *= 2;
    }
}

crate::multiversion! {
    fn add(sum: &mut [f32], other: &[f32]) {
        for (sum, other) in sum.iter_mut().zip(other) {
            *sum += other;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(values: &[f32]) -> f32 {
        let mut parts: Vec<Vec<f32>> = values.iter().map(|&x| vec![x]).collect();
        sum_along_tree(&mut parts);
        parts[0][0]
    }

    #[test]
    fn the_order_is_that_of_the_tree() {
        // Numbers whose sum depends on the order.
        let x = [1e8f32, 3.0, -1e8, 5.0, 7.0, 1e-3, 2e7, -9.0];
        let [a, b, c, d, e, f, g, h] = x;
        assert_eq!(sum(&x), ((a + b) + (c + d)) + ((e + f) + (g + h)));
        assert_eq!(sum(&x[..7]), ((a + b) + (c + d)) + ((e + f) + g));
        assert_eq!(sum(&x[..5]), ((a + b) + (c + d)) + e);
        assert_eq!(sum(&x[..3]), (a + b) + c);
        assert_eq!(sum(&x[..1]), a);
        assert_ne!(sum(&x), x.iter().sum::<f32>(), "the plain order gives another result, or this test shows nothing");
    }

    #[test]
    fn a_subtree_can_be_summed_first() {
        // What ranks that hold several neighbouring shards do: 8 leaves at once, or 4 ranks of 2, or 2 ranks of 4.
        let x: Vec<f32> = (0..8).map(|i| (i as f32 * 0.7).sin() * 10f32.powi(i)).collect();
        for shards in [2, 4] {
            let ranks: Vec<f32> = x.chunks(shards).map(sum).collect();
            assert_eq!(sum(&ranks), sum(&x));
        }
    }
}
