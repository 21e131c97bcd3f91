use super::upsample;
use crate::ops::add::add;
use crate::ops::testing::{Case, Input, random};

#[test]
fn copies_each_pixel_to_four_and_sums_their_gradients() {
    for [n, h, w, c] in [[3, 3, 5, 7], [2, 1, 1, 1], [1, 7, 2, 33], [2, 4, 4, 256]] {
        let x = random(1, n * h * w * c);
        let dy = random(2, 4 * x.len());
        let at = |n: usize, row: usize, column: usize, c_i: usize| ((n * 2 * h + row) * 2 * w + column) * c + c_i;
        let places = |i: usize| {
            let (channel, column, row, image) = (i % c, i / c % w, i / (c * w) % h, i / (c * w * h));
            [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(down, right)| at(image, 2 * row + down, 2 * column + right, channel))
        };
        for threads in [1, 2, 3] {
            let case = Case::new(vec![Input::f32("x", [n, h, w, c], &x)]).threads(threads);
            let result = case.run(&dy, |tape, v| upsample(tape, v[0]));
            let dx = result.gradient("x");
            for i in 0..x.len() {
                let [a, b, c, d] = places(i);
                assert!([a, b, c, d].iter().all(|&y| result.y[y] == x[i]), "[{n}, {h}, {w}, {c}] element {i}");
                assert_eq!(dx[i], (dy[a] + dy[b]) + (dy[c] + dy[d]));
            }
        }
    }
}

#[test]
fn adds_to_a_gradient_that_is_there() {
    let (x, dy) = (random(1, 2 * 3 * 5 * 6), random(2, 4 * 2 * 3 * 5 * 6));
    let case = Case::new(vec![Input::f32("x", [2, 3, 5, 6], &x)]);
    let once = case.run(&dy, |tape, v| upsample(tape, v[0]));
    let twice = case.run(&dy, |tape, v| {
        let (a, b) = (upsample(tape, v[0]), upsample(tape, v[0]));
        add(tape, a, b)
    });
    for (once, twice) in once.gradient("x").iter().zip(twice.gradient("x")) {
        assert_eq!(2.0 * once, twice);
    }
}
