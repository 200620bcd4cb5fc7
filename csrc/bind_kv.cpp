// Attention on packed keys and values in the Python module.
#include <vector>

#include "bind_kv.h"

namespace bitmill {

using namespace nb::literals;

namespace {

// Require that a part of so many bytes is inside a page; -1, for an absent part, is allowed if it is not required.
void check_part(const KvPages& p, int64_t first, int64_t bytes, bool required) {
    require(first >= 0 || (first == -1 && !required), "a part of the pages is missing");
    require(first < 0 || (bytes + 3) / 4 <= p.words - first, "a part is outside the page");
}

void check_side(const KvPages& p, const KvSide& s, int64_t code_words) {
    require(s.bits == 2 || s.bits == 3 || s.bits == 4 || s.bits == 8, "codes have 2, 3, 4 or 8 bits");
    require(s.groups == 1 || (0 < s.groups && s.groups <= p.channels() && s.groups % p.heads == 0 && p.channels() % (16 * s.groups) == 0),
            "groups are of a multiple of 16 channels of one head, or one is of all");
    require(s.axis == KvAxis::token || s.groups == 1, "only tokens have groups");
    require(0 <= s.outliers && s.outliers <= p.channels(), "a token has fewer outliers");
    const int64_t numbers = s.axis == KvAxis::token ? s.groups * kv_tokens : p.channels(), all = s.outliers * kv_tokens;
    check_part(p, s.codes, 4 * code_words, true);
    const bool fixed = s.axis == KvAxis::fixed || s.axis == KvAxis::channel;
    check_part(p, s.scale, 2 * numbers, !fixed);
    check_part(p, s.zero, 2 * numbers, false);
    check_part(p, s.outlier_value, 2 * all, s.outliers > 0);
    check_part(p, s.outlier_index, (p.wide() ? 2 : 1) * all, s.outliers > 0);
    require(!fixed || (s.scale < 0 && s.zero < 0), "calibrated numbers are not in the pages");
}

void new_pages(KvPages* self, int64_t heads, int64_t dim, int64_t words, const KvSide& key, const KvSide& value) {
    require(0 < heads && heads <= 65536 && dim > 0 && dim % 16 == 0 && dim <= 1024 && heads * dim <= 65536 && words > 0,
            "heads have a multiple of 16 numbers");
    const KvPages p{heads, dim, words, key, value};
    check_side(p, key, heads * 2 * ((dim * key.bits + 31) / 32) * 16);
    check_side(p, value, heads * dim * value.bits);
    require(value.axis == KvAxis::token, "scales of values are per token");
    new (self) KvPages(p);
}

using Ints = Array<const int32_t, 1>;

// Repeated to 16, where a register looks them up; those of `tables` channels come repeated.
std::vector<float> levels_of(const KvSide& side, const KvLayer::Floats& given, int64_t tables) {
    if (side.axis == KvAxis::channel) {
        require(side.bits <= 4 && given.size() == 16 * static_cast<size_t>(tables), "each channel has a table of 16");
        return {given.data(), given.data() + given.size()};
    }
    require(given.size() == size_t{1} << side.bits, "there is a level for each code");
    std::vector<float> levels(16);
    for (size_t i = 0; i < 16; ++i) levels[i] = given.data()[i % given.size()];
    for (size_t i = 0; side.bits == 8 && i < given.size(); ++i)
        require(given.data()[i] == static_cast<float>(i), "levels of 8 bits are the codes themselves");
    return levels;
}

template <class T>
std::vector<T> copied(const std::optional<Array<const T, 1>>& given, int64_t count, const char* what) {
    require(!given || static_cast<int64_t>(given->size()) == count, what);
    return given ? std::vector<T>(given->data(), given->data() + count) : std::vector<T>();
}

template <class T>
const T* or_null(const std::vector<T>& numbers) { return numbers.empty() ? nullptr : numbers.data(); }

bool is(size_t found, int64_t expected) { return static_cast<int64_t>(found) == expected; }

// A call on tokens, of which `start` and `first` have rows; all that it does not read of them is checked.
KvAttention call_of(const KvLayer& layer, const KvTokens& tokens, int64_t rows, int64_t heads, int64_t first_slot, int64_t packed,
                    int64_t sinks, int64_t tail, const int32_t* start, const int32_t* first, float scale) {
    const KvPages& p = layer.pages;
    require(rows > 0 && heads > 0 && heads % p.heads == 0, "q has another shape");
    const auto& slabs = tokens.slabs;
    const int64_t slab_pages = slabs.empty() ? 1 : slabs[0].shape(1);
    require(slabs.empty() || (is(slabs[0].shape(0), rows) && is(slabs[0].shape(2), p.words)), "slabs have another shape");
    require(packed >= 0 && packed % kv_tokens == 0 && first_slot >= 0 && slab_pages > 0 &&
                packed / kv_tokens <= static_cast<int64_t>(slabs.size()) * slab_pages,
            "the slabs have fewer pages");
    const KvTokens::Halves& fp16 = tokens.fp16_keys;
    require(is(fp16.shape(0), rows) && is(fp16.shape(1), p.heads) && is(fp16.shape(3), p.dim), "fp16 tokens have another shape");
    const int64_t room = fp16.shape(2);
    require(0 <= sinks && 0 <= tail && sinks <= room && tail <= room - sinks, "there are fewer fp16 tokens");
    return {p, rows, heads, nullptr, tokens.data.data(), slab_pages, first_slot, packed, tokens.keys(), tokens.values(), room, sinks,
            tail, start, first, layer.key_levels.data(), layer.value_levels.data(), or_null(layer.key_scale), or_null(layer.key_zero),
            or_null(layer.inv_freq), layer.turns.data(), layer.rope_scaling, scale, nullptr};
}

void attend_of(const KvLayer& layer, const KvTokens& tokens, Array<const float, 3> q, int64_t first_slot, int64_t packed,
               int64_t sinks, int64_t tail, Ints start, Ints first, float scale, Array<float, 3> out, int threads) {
    const int64_t rows = q.shape(0), heads = q.shape(1);
    require(is(q.shape(2), layer.pages.dim), "q has another shape");
    require(is(out.shape(0), rows) && is(out.shape(1), heads) && is(out.shape(2), layer.pages.dim), "out has another shape");
    require(is(start.size(), rows) && is(first.size(), rows), "each row has a start and a first slot in sight");
    KvAttention call = call_of(layer, tokens, rows, heads, first_slot, packed, sinks, tail, start.data(), first.data(), scale);
    call.q = q.data(), call.out = out.data();
    nb::gil_scoped_release free;
    kv_attend(call, threads);
}

}  // namespace

KvLayer::KvLayer(const KvPages& p, Floats keys, Floats values, MaybeFloats scale, MaybeFloats zero,
                 std::optional<Array<const double, 1>> frequencies, float rope_scaling)
    : pages(p), key_levels(levels_of(p.key, keys, p.channels())), value_levels(levels_of(p.value, values, 0)),
      key_scale(copied(scale, p.channels(), "each channel has a scale")),
      key_zero(copied(zero, p.channels(), "each channel has a zero")),
      inv_freq(copied(frequencies, p.dim / 2, "a frequency turns two channels of a head")), rope_scaling(rope_scaling) {
    require((p.key.axis == KvAxis::fixed) == scale.has_value(), "a fixed axis, and it alone, has calibrated numbers");
    turns = kv_rotations(inv_freq.data(), inv_freq.size());
}

KvTokens::KvTokens(Halves keys, Halves values) : fp16_keys(keys), fp16_values(values) {
    for (size_t i = 0; i < 4; ++i) require(keys.shape(i) == values.shape(i), "fp16 keys and values have one shape");
}

void KvTokens::append(Slab slab) {
    for (size_t i = 0; i < 3 && !slabs.empty(); ++i) require(slab.shape(i) == slabs[0].shape(i), "slabs have one shape");
    slabs.push_back(slab);
    data.push_back(reinterpret_cast<const uint32_t*>(slab.data()));
}

KvBlock::KvBlock(const KvLayer& layer, const KvTokens& tokens, KvLayer::MaybeFloats key_turn, KvLayer::MaybeFloats value_turn,
                 KvLayer::MaybeFloats value_mean, KvLayer::MaybeFloats value_deviation)
    : layer(layer), tokens(tokens), mean(copied(value_mean, layer.pages.channels(), "each channel has a mean")),
      deviation(copied(value_deviation, layer.pages.channels(), "each channel has a deviation")) {
    const int64_t dim = layer.pages.dim;
    require(value_mean.has_value() == value_deviation.has_value(), "a mean has a deviation");
    keys = copied(key_turn, dim * dim, "a basis is of a head's numbers");
    values = copied(value_turn, dim * dim, "a basis is of a head's numbers");
    values_back.resize(values.size());
    for (size_t i = 0; i < values.size(); ++i) values_back[i % dim * dim + i / dim] = values[i];
}

Packed KvBlock::packed(const Shape& shape, int64_t packed, int64_t sinks, int64_t waiting) const {
    static constexpr int32_t none = 0;
    require(layer.pages.heads == shape.kv_heads && layer.pages.dim == shape.dim, "a layer has other heads");
    require(0 <= waiting && waiting < static_cast<int64_t>(tokens.fp16_keys.shape(2)), "there is no room for a token");
    const KvAttention call = call_of(layer, tokens, 1, shape.heads, 0, packed, sinks, waiting + 1, &none, &none, 1.0f);
    return {call, tokens.keys(), tokens.values(), {or_null(keys)},
            {or_null(values), or_null(values_back), or_null(mean), or_null(deviation)}};
}

void bind_kv(nb::module_& m) {
    nb::class_<KvSide>(m, "KvSide").def("__init__", [](KvSide* self, int bits, int axis, int64_t groups, int64_t outliers, int64_t codes,
                                                       int64_t scale, int64_t zero, int64_t outlier_value, int64_t outlier_index) {
        require(0 <= axis && axis <= 3, "an axis is 0 (fixed), 1 (page), 2 (token) or 3 (channel)");
        new (self) KvSide{bits, static_cast<KvAxis>(axis), groups, outliers, codes, scale, zero, outlier_value, outlier_index};
    }, "bits"_a, "axis"_a, "groups"_a, "outliers"_a, "codes"_a, "scale"_a, "zero"_a, "outlier_value"_a, "outlier_index"_a);
    nb::class_<KvPages>(m, "KvPages").def("__init__", new_pages, "heads"_a, "dim"_a, "words"_a, "key"_a, "value"_a);
    nb::class_<KvLayer>(m, "KvLayer")
        .def(nb::init<const KvPages&, KvLayer::Floats, KvLayer::Floats, KvLayer::MaybeFloats, KvLayer::MaybeFloats,
                      std::optional<Array<const double, 1>>, float>(),
             "pages"_a, "key_levels"_a, "value_levels"_a, "key_scale"_a.none(), "key_zero"_a.none(), "inv_freq"_a.none(),
             "rope_scaling"_a);
    nb::class_<KvTokens>(m, "KvTokens")
        .def(nb::init<KvTokens::Halves, KvTokens::Halves>(), "loose_keys"_as_is, "loose_values"_as_is)
        .def("append", &KvTokens::append, "slab"_a);
    nb::class_<KvBlock>(m, "KvBlock")
        .def(nb::init<const KvLayer&, const KvTokens&, KvLayer::MaybeFloats, KvLayer::MaybeFloats, KvLayer::MaybeFloats,
                      KvLayer::MaybeFloats>(),
             "layer"_a, "tokens"_a, "key_turn"_a.none(), "value_turn"_a.none(), "value_mean"_a.none(), "value_deviation"_a.none(),
             nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>());
    m.def("kv_attend", attend_of, "layer"_a, "tokens"_a, "q"_a, "first_slot"_a, "packed"_a, "sinks"_a, "tail"_a, "start"_a,
          "first"_a, "scale"_a, "out"_a, "threads"_a);
}

}  // namespace bitmill
